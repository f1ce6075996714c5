"""Workers: RQ processes that run compression jobs."""
