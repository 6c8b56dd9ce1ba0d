"""The commands that users run, one a file; imports everything below."""
