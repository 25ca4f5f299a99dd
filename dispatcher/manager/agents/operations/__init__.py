"""Operations on agents: start, suspension, stop, reset, removal and moves, each step by step."""
