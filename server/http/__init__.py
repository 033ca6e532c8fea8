"""HTTP plumbing below the routes: limits, request bodies, error responses, downloads, proxies and the request log."""
