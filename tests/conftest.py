"""What holds for all tests."""

import os

from hypothesis import HealthCheck, settings

# How long an example takes tells of the machine, and of what else runs on it.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# No proxy of the environment lies between a test and the servers on loopback that it starts.
# (tests/process/test_proxies.py puts some there.)
for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[name]
