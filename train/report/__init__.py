"""What people look at: terminal, HTML and figures; imports `run_folder` and below."""
