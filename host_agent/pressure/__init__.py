"""What the host decides in policies `pressure` and `adaptive`: how much memory a guest may hint
when the host is short of memory, and for how long it may hold memory back."""
