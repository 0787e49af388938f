"""Operations that are tuned for each platform, all exact to float32 rounding."""
