"""What we run on: the environment, devices, processes, files, the terminal."""
