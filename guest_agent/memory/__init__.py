"""A guest's memory: an emulated buddy allocator, or what a real guest's kernel reports; hotplug."""
