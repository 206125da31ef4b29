"""How a stage runs: its command line, log, console, errors and signals.

Nothing here can change a result, so no stage's code hash holds it (workflow/code.py).
"""
