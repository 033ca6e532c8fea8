"""The tests: folders mirror the rooms, and every part they touch is the real one."""
