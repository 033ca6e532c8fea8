"""What this machine offers: its devices, cores, memory and disk space."""
