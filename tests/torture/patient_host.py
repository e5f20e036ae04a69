"""The host agent, which holds nothing against a guest: a session that is replayed breaks rules
in the guest's name, again and again, and the guest would be kept out for it."""

from host_agent.__main__ import main
from tests.support.patience import patience

if __name__ == "__main__":
    with patience():
        main()
