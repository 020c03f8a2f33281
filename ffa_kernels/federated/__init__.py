"""A thin federated driver: sites train, the server averages what they trained, one file says it all."""
