/// As `ProcessInfo.ThermalState`.
public enum ThermalLevel: Int, Sendable, Comparable, CaseIterable {
    case nominal, fair, serious, critical

    public static func < (a: Self, b: Self) -> Bool { a.rawValue < b.rawValue }
}

/// How fast to write at which temperature. A phone that throttles its own clock gets slower and stays hot; one that rests
/// between tokens cools down.
public struct ThermalPolicy: Sendable, Equatable {
    public enum Pace: Sendable, Equatable {
        case full
        /// Rest after each token, for as long as the token took times this.
        case resting(Double)
        /// Write nothing until it has cooled down.
        case paused
    }

    public private(set) var pace = Pace.full

    public init() {}

    /// Once paused it stays so until the level is below serious, or it would go on and off.
    public mutating func update(_ level: ThermalLevel) {
        switch level {
        case .nominal, .fair: pace = .full
        case .serious: pace = pace == .paused ? .paused : .resting(1)
        case .critical: pace = .paused
        }
    }

    /// How long to rest after a token that took so long. Nil: until the pace changes.
    public func rest(after token: Duration) -> Duration? {
        switch pace {
        case .full: .zero
        case .resting(let share): token * share
        case .paused: nil
        }
    }
}
