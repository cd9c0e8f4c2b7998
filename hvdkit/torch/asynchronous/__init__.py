"""The collectives by name: each returns a handle, for `poll` and `synchronize`.

Names, arguments and defaults are Horovod's.  Ranks may start them in different orders.
"""
