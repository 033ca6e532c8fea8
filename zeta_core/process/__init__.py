"""The processes of a training: launching them, and monitoring the signs of life of its supervisor."""
