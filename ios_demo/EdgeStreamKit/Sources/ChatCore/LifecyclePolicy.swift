/// What the system tells an app.
public enum SystemEvent: Sendable, Equatable {
    case background
    case foreground
    case memoryWarning
    case thermal(ThermalLevel)
}

/// What an app with a model in memory does about it.
public struct LifecyclePolicy: Sendable, Equatable {
    public enum Step: Sendable, Equatable {
        /// End the open answer; what was written stays.
        case settle
        case save
        /// Let go of cache and model.
        case release
        /// Load the model again and go on where the session was.
        case resume
        /// Tell the user.
        case tell(ChatState.Notice)
    }

    /// Below this, a memory warning means that the app is next.
    public var critical: UInt64

    public init(critical: UInt64 = 128 << 20) {
        self.critical = critical
    }

    /// In the background the GPU may not be used, and whoever holds most memory is ended first: so nothing is held.
    /// A memory warning always saves, so that being ended costs nothing; it releases where little is left.
    public func steps(
        for event: SystemEvent, phase: ChatState.Phase, availableMemory: UInt64?
    ) -> [Step] {
        let isResident =
            switch phase {
            case .idle, .reading, .writing: true
            case .noModel, .loading, .suspended: false
            }
        switch event {
        case .background:
            if case .loading = phase { return [.release] }
            return isResident ? [.settle, .save, .release] : []
        case .foreground:
            return phase == .suspended(.background) ? [.resume] : []
        case .memoryWarning:
            guard isResident else { return [] }
            let isCritical = availableMemory.map { $0 < critical } ?? true
            return isCritical ? [.settle, .save, .release, .tell(.memoryShort)] : [.settle, .save, .tell(.memoryShort)]
        case .thermal(let level):
            return level == .critical && isResident ? [.tell(.tooHot)] : []
        }
    }
}
