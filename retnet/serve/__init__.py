"""A checkpoint behind the HTTP API of OpenAI, for the clients that people have."""
