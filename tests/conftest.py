"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# How long an example takes tells of the machine, and of what else runs on it.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
