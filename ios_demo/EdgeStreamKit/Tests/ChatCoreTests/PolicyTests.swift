import ChatCore
import Testing

@Suite struct PolicyTests {
    static let resident: [ChatState.Phase] = [.idle, .writing, .reading(done: 1, total: 2)]
    static let absent: [ChatState.Phase] = [.noModel, .suspended(.background), .suspended(.memory)]

    @Test func memoryBudget() {
        let budget = MemoryBudget(reserve: 100)
        #expect(budget.judge(need: 900, available: 1000) == .fits)
        #expect(budget.judge(need: 901, available: 1000) == .refused(short: 1))
        #expect(budget.judge(need: 1, available: 0) == .refused(short: 101))
        #expect(budget.judge(need: .max, available: 1000) != .fits)  // no overflow
        #expect(budget.judge(need: 1 << 50, available: nil) == .fits)  // the system does not tell
    }

    @Test func heatSlowsThenPauses() {
        var policy = ThermalPolicy()
        let token = Duration.milliseconds(40)
        #expect(policy.rest(after: token) == .zero)
        policy.update(.serious)
        #expect(policy.rest(after: token) == token)
        policy.update(.critical)
        #expect(policy.rest(after: token) == nil)
        policy.update(.serious)  // not cool enough to go on
        #expect(policy.pace == .paused)
        policy.update(.fair)
        #expect(policy.pace == .full)
        policy.update(.serious)
        #expect(policy.pace == .resting(1))
    }

    @Test(arguments: resident)
    func theBackgroundSavesAndReleases(phase: ChatState.Phase) {
        let policy = LifecyclePolicy()
        #expect(policy.steps(for: .background, phase: phase, availableMemory: nil) == [.settle, .save, .release])
        #expect(policy.steps(for: .foreground, phase: phase, availableMemory: nil).isEmpty)
    }

    @Test(arguments: absent)
    func nothingIsReleasedTwice(phase: ChatState.Phase) {
        let policy = LifecyclePolicy()
        #expect(policy.steps(for: .background, phase: phase, availableMemory: nil).isEmpty)
        #expect(policy.steps(for: .memoryWarning, phase: phase, availableMemory: 0).isEmpty)
        let resumes = phase == .suspended(.background) ? [LifecyclePolicy.Step.resume] : []
        #expect(policy.steps(for: .foreground, phase: phase, availableMemory: nil) == resumes)
    }

    @Test func loadingStopsInTheBackground() {
        #expect(LifecyclePolicy().steps(for: .background, phase: .loading(0.5), availableMemory: nil) == [.release])
    }

    @Test(arguments: resident)
    func aMemoryWarningAlwaysSaves(phase: ChatState.Phase) {
        let policy = LifecyclePolicy(critical: 100)
        #expect(
            policy.steps(for: .memoryWarning, phase: phase, availableMemory: 1000) == [.settle, .save, .tell(.memoryShort)])
        for available: UInt64? in [99, nil] {
            #expect(
                policy.steps(for: .memoryWarning, phase: phase, availableMemory: available)
                    == [.settle, .save, .release, .tell(.memoryShort)])
        }
    }

    @Test func coalescing() {
        var coalescer = TokenCoalescer(interval: .milliseconds(50))
        let start = ContinuousClock.now
        var shown: [String] = []
        for i in 0..<100 {  // a token per millisecond
            if let text = coalescer.add("\(i),", at: start + .milliseconds(i)) {
                shown.append(text)
            }
        }
        #expect(shown == ["0,", (1...50).map { "\($0)," }.joined()])
        #expect(coalescer.finish() == (51..<100).map { "\($0)," }.joined())
        #expect(coalescer.finish() == nil)
        #expect(coalescer.add("", at: start + .seconds(9)) == nil)
    }
}
