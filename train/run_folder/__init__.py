"""The files of a run and what is read back from them; imports `config`."""
