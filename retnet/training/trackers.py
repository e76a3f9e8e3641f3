"""Other people's trackers, where ``train.trackers`` asks for them: each writes into the run folder.

Nothing here prompts, waits for a network or needs an account. A run that goes on from a checkpoint
goes on in the tracker's run too. accelerate has the calls; what they lack to stay local, to find
the run of before and to take a text stands here, one class a tracker.
"""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from retnet.errors import UserError
from retnet.training.spec import Config, flatten

logger = logging.getLogger(__name__)

PROJECT = "retnet"
WANDB_FILES_ONLY = ("offline", "dryrun", "disabled")
WANDB_MODES = ("online", "run", "shared", *WANDB_FILES_ONLY)
NETWORK_WAIT_S = 20  # for wandb, where WANDB_MODE asks for the network


class Tracker:
    """What a tracker needs; also enough for one that needs nothing."""

    # variables of the environment that would have it write elsewhere
    refused: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise a ``UserError`` where the environment asks for what can't be."""

    def options(self, run: Path, step: int) -> dict[str, Any]:
        """accelerate's keywords for it, of a run that goes on after ``step`` steps (0: is new)."""
        return {}

    def store(self, tracker: Any, facts: dict[str, Any]) -> None:
        """Keep the configuration."""
        tracker.store_init_configuration(facts)

    def text(self, tracker: Any, name: str, text: str, step: int) -> None:
        """Keep a text."""
        tracker.log({name: text}, step=step)

    def end(self) -> None:
        """What accelerate leaves to do when the run has ended."""

    def hint(self, run: Path) -> str:
        """How to look at what it wrote; empty: nothing to say."""
        return ""


class Wandb(Tracker):
    """Offline unless the environment variable WANDB_MODE says otherwise."""

    @property
    def mode(self) -> str:
        return os.environ.get("WANDB_MODE", "offline")

    def check(self) -> None:
        if self.mode not in WANDB_MODES:
            raise UserError(
                f"WANDB_MODE ({self.mode}) must be one of {', '.join(WANDB_MODES)}: unset it to "
                "write the run to files"
            )
        if self.mode not in WANDB_FILES_ONLY:
            import wandb

            if not wandb.login(prompt=False, verify=False):
                raise UserError(
                    f"WANDB_MODE ({self.mode}) needs an account for train.trackers (wandb): run "
                    "wandb login, or unset it to write the run to files"
                )

    def options(self, run: Path, step: int) -> dict[str, Any]:
        options: dict[str, Any] = {"mode": self.mode, "dir": str(run), "name": run.name}
        if self.mode not in WANDB_FILES_ONLY:
            options["settings"] = {"init_timeout": NETWORK_WAIT_S}
        # offline or not, folders are named by their time; their names end with the id, and with a
        # number more where two began in one second
        files = (run / "wandb").glob("*run-*-*/run-*.wandb")
        newest = max(files, key=lambda file: file.parent.name.partition("run-")[2], default=None)
        if step and newest:
            options["id"] = newest.stem.removeprefix("run-")
            if self.mode not in WANDB_FILES_ONLY:
                options["resume"] = "allow"
        return options

    def hint(self, run: Path) -> str:
        if self.mode != "offline":
            return ""
        sync = f"wandb sync {run}/wandb/*run-*"
        return f"wandb is offline; to upload the run later: {sync} (--append where it went on)"


class TensorBoard(Tracker):
    """Files in a folder: those of a run that went on are read as one."""

    def options(self, run: Path, step: int) -> dict[str, Any]:
        return {"purge_step": step + 1} if step else {}


class Trackio(Tracker):
    """A database of its own, whose place it reads from the environment when it is imported."""

    refused = ("TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")

    def options(self, run: Path, step: int) -> dict[str, Any]:
        for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
            del sys.modules[name]  # an earlier run of this process had another place
        os.environ["TRACKIO_DIR"] = str(run.absolute() / "trackio")
        try:
            importlib.import_module("trackio")
        finally:
            del os.environ["TRACKIO_DIR"]
        resume = "allow" if step else "never"
        options = {"name": run.name, "resume": resume, "embed": False}
        return options | {"auto_log_cpu": False, "auto_log_gpu": False}

    def end(self) -> None:
        from trackio import context_vars

        context_vars.current_run.set(None)  # or it is ended once more with the program

    def hint(self, run: Path) -> str:
        return f"to see the run: TRACKIO_DIR={run.absolute()}/trackio trackio show"


class MLflow(Tracker):
    """A database and a folder of texts."""

    refused = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID")

    def options(self, run: Path, step: int) -> dict[str, Any]:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        folder = run.absolute() / "mlflow"
        folder.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # it is set there too, as if by the user
        options = {"logging_dir": (folder / "artifacts").as_uri(), "run_name": run.name}
        if step:
            before = mlflow.search_runs(experiment_names=[PROJECT], output_format="list")
            options |= {"run_id": before[0].info.run_id} if before else {}
        return options

    def store(self, tracker: Any, facts: dict[str, Any]) -> None:
        if not tracker.tracker.data.params:  # they can't be changed, and more steps are a change
            super().store(tracker, facts)

    def text(self, tracker: Any, name: str, text: str, step: int) -> None:
        import mlflow

        mlflow.log_text(text, f"{name}/step_{step}.txt")

    def hint(self, run: Path) -> str:
        uri = f"sqlite:///{run.absolute()}/mlflow/mlflow.db"
        return f"to see the run: mlflow ui --backend-store-uri {uri}"


class Aim(Tracker):
    """A repository of its own in the run folder."""

    def options(self, run: Path, step: int) -> dict[str, Any]:
        from aim import Repo

        # that it takes over from a run that died is no danger: the folder is locked
        logging.getLogger("aim.sdk.lock_manager").setLevel(logging.ERROR)
        repo = Repo.from_path(str(run), init=True)
        options: dict[str, Any] = {"system_tracking_interval": None}
        options["capture_terminal_logs"] = False
        before = repo.list_all_runs() if step else []
        return options | ({"run_hash": before[0], "force_resume": True} if before else {})

    def text(self, tracker: Any, name: str, text: str, step: int) -> None:
        from aim import Text

        tracker.log({name: Text(text)}, step=step)

    def hint(self, run: Path) -> str:
        return f"to see the run: aim up --repo {run}"


TRACKERS: dict[str, Tracker] = {
    "wandb": Wandb(),
    "tensorboard": TensorBoard(),
    "trackio": Trackio(),
    "mlflow": MLflow(),
    "aim": Aim(),
}


def check_trackers(config: Config) -> None:
    """Raise a ``UserError`` when a tracker of ``train.trackers`` can't be had; never prompts."""
    for name in config.train.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"train.trackers ({name}) is not installed: pip install {name}")
        for variable in TRACKERS[name].refused:
            if os.environ.get(variable):
                raise UserError(
                    f"{variable} ({os.environ[variable]}) would have train.trackers ({name}) write "
                    "elsewhere, and a run writes into its own folder: unset it"
                )
        TRACKERS[name].check()


def start_trackers(
    accelerator: Accelerator, config: Config, facts: dict[str, Any], step: int
) -> None:
    """Start the trackers of ``train.trackers``; they write into the run folder.

    Args:
        accelerator: It logs to them from then on.
        config: They keep it as the run's configuration.
        facts: What they keep besides: numbers and texts.
        step: The completed steps; above 0 the run of before is gone on with.

    Raises:
        UserError: One of them can't be started.
    """
    names, run = config.train.trackers, config.train.run_folder
    if not names:
        return
    keys = {
        key: str(value) if isinstance(value, list) else value  # TensorBoard knows no lists
        for key, value in flatten(config).items()
        if value is not None
    }
    try:
        with redirect_stdout(sys.stderr):  # the other is for generated text
            options = {name: TRACKERS[name].options(run, step) for name in names}
            accelerator.init_trackers(PROJECT, init_kwargs=options)
            for tracker, own in _started(accelerator):
                own.store(tracker, keys | facts)
    except Exception as error:  # each library has its own kinds
        accelerator.trackers.clear()  # half started, they can't be ended either
        raise UserError(
            f"train.trackers ({', '.join(names)}) can't be started "
            f"({str(error) or type(error).__name__}): leave them out, or look at {run} and, for "
            f"wandb, at WANDB_MODE ({Wandb().mode})"
        ) from error
    for name in names:
        if hint := TRACKERS[name].hint(run):
            logger.info(hint)


def log_text(accelerator: Accelerator, name: str, text: str, step: int) -> None:
    """Give a text to all trackers that were started."""
    if text:
        for tracker, own in _started(accelerator):
            own.text(tracker, name, text, step)


def _started(accelerator: Accelerator) -> Iterator[tuple[Any, Tracker]]:
    for tracker in accelerator.trackers:
        yield tracker, TRACKERS[tracker.name]


def end_training(accelerator: Accelerator) -> None:
    """Close trackers and process group; a tracker that can't be closed does not hide an error."""
    try:
        with redirect_stdout(sys.stderr):
            ended = [own for _, own in _started(accelerator)]
            accelerator.end_training()
            for own in ended:
                own.end()
    except OSError as error:
        logger.warning(f"train.trackers can't be closed ({error.strerror or error})")
