"""The suite, in rooms like those of the code that it tests."""
