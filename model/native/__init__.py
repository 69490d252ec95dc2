"""What is compiled on this machine, without a compiler having to be installed: numba's.

One written token passes some 1,300 small operations, which cost more to dispatch one by one than to compute. Here they
are one call that holds no lock of Python's.
"""
