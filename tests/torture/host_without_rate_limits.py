"""The host agent without rate limits and bans: replayed sessions break rules in the name of a
guest, which would be banned for that."""

from host_agent.__main__ import main
from tests.support.no_rate_limits import no_rate_limits

if __name__ == "__main__":
    with no_rate_limits():
        main()
