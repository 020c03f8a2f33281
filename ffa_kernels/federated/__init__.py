"""A thin federated driver: sites train, the server averages, one file says it all."""
