"""The engine protocol, engine and model specs, and the engines that prill brings."""
