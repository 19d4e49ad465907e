"""The paper's online test replayed offline: a ranking model with and without what LEARN adds."""
