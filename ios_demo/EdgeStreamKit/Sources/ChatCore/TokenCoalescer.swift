/// Joins the text of tokens, so that a screen is laid out some times per second instead of once per token.
public struct TokenCoalescer: Sendable {
    public let interval: Duration
    private var text = ""
    private var last: ContinuousClock.Instant?

    public init(interval: Duration = .milliseconds(50)) {
        self.interval = interval
    }

    /// The text to show now, if it is time. The first text is shown at once.
    public mutating func add(_ piece: String, at now: ContinuousClock.Instant) -> String? {
        text += piece
        if let last, last.duration(to: now) < interval {
            return nil
        }
        guard !text.isEmpty else { return nil }
        last = now
        return finish()
    }

    /// What has not been shown yet.
    public mutating func finish() -> String? {
        defer { text = "" }
        return text.isEmpty ? nil : text
    }
}
