"""The guest agent: runs inside a guest, finds free chunks, isolates and hints them to the host."""
