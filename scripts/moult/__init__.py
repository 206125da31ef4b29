"""What two or more of Moult's stages share. Importing the package imports nothing else."""

__version__ = "0.1.0"
