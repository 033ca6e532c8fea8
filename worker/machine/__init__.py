"""The resources of this machine: devices, cores, memory and disk space."""
