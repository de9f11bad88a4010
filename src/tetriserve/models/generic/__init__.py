"""Any text-to-image pipeline of diffusers, driven through its own call."""
