"""How many examples the tests with hypothesis try."""

from hypothesis import HealthCheck, settings

# The same examples each time, about a minute in all; `--hypothesis-profile=long` looks at others, and at more.
EVERYWHERE = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("ci", max_examples=100, derandomize=True, **EVERYWHERE)
settings.register_profile("long", max_examples=5000, print_blob=True, **EVERYWHERE)
settings.load_profile("ci")


def examples(count: int) -> settings:
    """Settings for `count` examples; 50 times as many under `--hypothesis-profile=long`."""
    return settings(max_examples=count * settings.default.max_examples // 100)
