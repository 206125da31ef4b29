"""Measuring a model: likelihood, checks of answers, intervals."""
