"""HTTP plumbing below the routes: limits, request bodies, error responses, downloads, streaming and proxies."""
