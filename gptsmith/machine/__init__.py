"""The machine: environment, devices, processes, files and the terminal."""
