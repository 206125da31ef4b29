"""How a stage runs: its log, its console, its errors and signals.

Nothing here can change a result, so no stage's code hash holds it (workflow/code.py).
"""
