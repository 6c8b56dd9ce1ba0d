"""Several processes: joining, sharing rows out, and stopping together; imports `config`."""
