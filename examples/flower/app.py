"""The two ends of the federation, as `flwr run` finds them through pyproject.toml."""

from ffa_kernels.federated.flower import client_app, server_app

client = client_app()
server = server_app()
