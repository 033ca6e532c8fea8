"""The worker: takes jobs from its own Celery queue, runs each as a marked process tree, and publishes its journal."""
