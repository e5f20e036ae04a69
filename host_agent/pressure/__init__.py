"""Policy `pressure`: how much memory each guest may hint when the host is short of memory."""
