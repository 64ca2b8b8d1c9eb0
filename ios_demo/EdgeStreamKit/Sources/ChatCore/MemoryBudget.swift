/// Whether a session may be opened: known before anything is loaded, since the system ends an app that takes too much.
public struct MemoryBudget: Sendable, Equatable {
    /// Bytes left for the app itself, the keyboard and the moment in which a session is saved.
    public var reserve: UInt64

    public init(reserve: UInt64 = 256 << 20) {
        self.reserve = reserve
    }

    public enum Verdict: Sendable, Equatable {
        case fits
        case refused(short: UInt64)
    }

    /// `need`: what weights, cache and scratch take, in bytes. Weights count in full although a mapped file is clean
    /// memory: the GPU holds on to them. `available`: bytes that this process may still take; nil where the system does
    /// not tell, and then nothing is refused.
    public func judge(need: UInt64, available: UInt64?) -> Verdict {
        guard let available else { return .fits }
        let (wanted, overflow) = need.addingReportingOverflow(reserve)
        return !overflow && wanted <= available ? .fits : .refused(short: wanted &- available)
    }
}
