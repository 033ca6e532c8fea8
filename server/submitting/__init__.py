"""Creates jobs: validates submitted specs and their references, checks resumes, and patches the specs of reruns."""
