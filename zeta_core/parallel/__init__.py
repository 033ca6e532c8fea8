"""How a model is spread over processes and devices: whole on each, FSDP2, or ZeRO."""
