"""Corpora -> documents -> tokens -> batches."""

from retnet.data.batches import TrainingBatches, ValidationBatches
from retnet.data.lanes import CarriedBatches, CarriedValidationBatches
from retnet.data.prepare import prepare_data, rebuild_validation
from retnet.data.prepared import PreparedData
from retnet.data.spec import DataSpec
from retnet.data.token_file import TokenFile
from retnet.data.tokenizer import byte_tokenizer, encode_documents, load_tokenizer, train_bpe
