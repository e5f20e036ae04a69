"""What a guest is on this host: the driver protocol and its two drivers."""
