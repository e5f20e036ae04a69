"""Settings for all tests: Hypothesis sets no deadline, and the environment has no proxies."""

import os

from hypothesis import HealthCheck, settings

# No deadline: how long an example takes depends on the machine, and on what else runs on it.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# Remove the environment's proxies: tests connect to servers on loopback. Only
# tests/process/test_proxies.py sets proxies.
for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[name]
