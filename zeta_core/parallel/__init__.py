"""Distributing a model over processes and devices: DDP, FSDP2 or ZeRO."""
