"""What a user can get wrong, and what he is told. One module per kind of input; tests/test_bad_inputs.py checks them all."""
