"""The guest agent: isolates a guest's free chunks, hints them to the host, and runs workloads."""
