"""Policy `pressure`: which guests give memory when the host is short of it."""
